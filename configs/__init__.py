"""The configuration tree, carried as a package so that an installed copy has it too."""
