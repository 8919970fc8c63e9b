"""Search: the live web when there is a network, a local full-text index when there is none."""

from tools.search.backend import BackendUnavailable, SearchBackend, SearchHit
from tools.search.index import LocalIndex, build_index
from tools.search.library import index_folder, open_library
from tools.search.live import DdgsBackend
from tools.search.tool import SearchTool

__all__ = [
    "BackendUnavailable",
    "DdgsBackend",
    "LocalIndex",
    "SearchBackend",
    "SearchHit",
    "SearchTool",
    "build_index",
    "index_folder",
    "open_library",
]
