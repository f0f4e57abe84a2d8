"""The round loop, the run directory, the message codec, and the engines that carry messages."""
