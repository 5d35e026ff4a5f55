"""The commands, one file each; `perfmodel.cli` loads the one that is asked for."""
