"""What the messages leak, and what keeps them from leaking."""
