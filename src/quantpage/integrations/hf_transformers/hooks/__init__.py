"""What an attached model calls of ours, and where it is left to itself."""
