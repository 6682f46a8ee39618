"""The parts of the shapes demos, one file each."""
