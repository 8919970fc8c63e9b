"""What the policy can do besides writing: run Python in a sandbox, and search."""
