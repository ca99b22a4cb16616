"""Second floor: when, and how it survives a checkpoint. What is done, the floors below decide."""
