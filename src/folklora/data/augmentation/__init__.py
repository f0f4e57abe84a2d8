"""More examples than a client has, in the feature space of the frozen backbone: features in, features out.

Three makers of features for the classes that a client has, and a chooser. A maker that has nothing to go by makes
nothing, and the client has its real examples alone.
"""
