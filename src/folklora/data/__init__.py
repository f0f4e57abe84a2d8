"""Where examples come from (`sources`), how clients share them (`partition`) and split their own (`split`)."""
