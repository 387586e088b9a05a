"""hetero-splitee: cuts, strategies, capture and the memory plan."""
