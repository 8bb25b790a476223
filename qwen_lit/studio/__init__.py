"""The local page: it writes a YAML, runs the same commands as processes, and shows the files that they leave."""
