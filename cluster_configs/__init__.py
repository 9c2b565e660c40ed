"""The cluster configs that ship with meshrun; a package only so that a wheel carries them."""
