"""Everything that reads the log: fold, materializer, chord decision, replay."""
