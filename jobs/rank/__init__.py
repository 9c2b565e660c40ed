"""Inside one rank: who it is, how it meets the others, what it runs."""
