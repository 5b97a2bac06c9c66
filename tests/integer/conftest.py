"""The released networks, as the tests of exports have them."""

from tests.export.conftest import released

__all__ = ["released"]
