"""The doors that all methods have: sample, evaluate, convert, patch; downloads, environments, bug reports."""
