"""Low-rank adapters with a leading client axis: what they are, how they start, how they run, how they leave as PEFT."""
