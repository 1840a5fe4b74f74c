"""A graph and its texts to vectors of users and items, their scores and the losses."""
