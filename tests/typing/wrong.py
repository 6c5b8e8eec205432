"""Mistakes that `mypy --strict` must find, a line each (`tests/test_typing.py`)."""

import kvision

kvision.create_modle("resnet20")  # no such name
kvision.create_model(20)  # a name is a string
kvision.create_model("resnet20", class_count="10", weights=10)  # weights are a path
kvision.weights.sav("x")  # no such name
kvision.list_models("resnet*").upper()  # a list
kvision.applications.VGG17()  # no such network
kvision.fit(epochs=2)  # no model
kvision.fit(kvision.create_model("resnet20"), epochs="two")  # a number
