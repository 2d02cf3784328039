"""Microsoft's mscclpp package: the communicator, and what it holds of the package."""
