"""EasyEdit: the method `MM4KE`, and its benchmark beside the others."""
