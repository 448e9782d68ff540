"""Bit allocation: from sensitivities and budgets to bits per layer. One file per allocator."""
