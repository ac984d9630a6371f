"""The whole numbers that arguments are held to. Hydra's plugins read this whenever it starts: nothing heavy is here."""

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's RandomState takes
