"""Search: the live web when there is a network, a local full-text index when there is none."""
