"""The values that pass between memopt's packages. Nothing here imports the rest of memopt."""
