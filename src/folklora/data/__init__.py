"""Where examples come from (`sources`) and how clients share them (`partition`)."""
