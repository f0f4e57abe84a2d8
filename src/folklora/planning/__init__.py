"""How large a model is worth: a law fitted to a few small runs, and what it says of those nobody has run."""
