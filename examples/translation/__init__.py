"""Translation between two generated languages with different word order; the second has agreement."""
