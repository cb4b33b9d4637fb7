"""A small scene that the tests of the built-in world share."""

from jrm_jax.data.world.vocabulary import Scene, Thing


def a_scene():
    """A red circle at the top left, a blue star at the top, a green square in the middle."""
    return Scene(
        "white",
        (
            Thing(0, "red", "circle", "medium", 0, 1, -2),
            Thing(1, "blue", "star", "large", 1, 0, 0),
            Thing(2, "green", "square", "small", 4, 3, 3),
        ),
    )
