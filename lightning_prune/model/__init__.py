"""First floor: what the ground floor says, done to an `nn.Module`. Imports torch and the floors below."""
