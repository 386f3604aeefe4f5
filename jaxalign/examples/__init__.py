"""The quickstart and the stories run: users of the package like any other."""
