"""The nano world: generated conversations with exact onsets, their oracle, and `redflag demo --world nano`."""
