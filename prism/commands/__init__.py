"""The commands that `prism.cli` calls after it has checked their arguments."""
