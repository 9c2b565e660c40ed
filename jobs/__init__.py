"""How a job gets onto machines, and how its ranks find each other."""
