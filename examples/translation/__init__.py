"""Translation between two generated languages of different word order, one of which has agreement."""
