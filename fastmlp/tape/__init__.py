"""The parts of `fastmlp.capture`: what is recorded, and how it becomes a tape."""
