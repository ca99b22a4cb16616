"""What is told of a run: plain data, its files, and how it is shown. No torch here."""
