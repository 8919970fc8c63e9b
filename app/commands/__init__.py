"""The commands of `whetstone`, one file a group. Each imports what it runs when it runs, so that --help is quick."""
