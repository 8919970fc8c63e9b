"""Search: the live web when there is a network, a local full-text index when there is none."""

from tools.search.backend import BackendUnavailable, SearchBackend, SearchHit
from tools.search.breaker import Breaker
from tools.search.ddgs import DdgsBackend
from tools.search.folder import IndexedFolder, Report, index_folder, indexed_folders, remove_folder
from tools.search.guarded import GuardedBackend
from tools.search.index import LocalIndex, build_index
from tools.search.library import folders_of, open_library
from tools.search.options import SearchOptions, open_search
from tools.search.searxng import SearxngBackend
from tools.search.tool import SearchTool

__all__ = [
    "BackendUnavailable",
    "Breaker",
    "DdgsBackend",
    "GuardedBackend",
    "IndexedFolder",
    "LocalIndex",
    "Report",
    "SearchBackend",
    "SearchHit",
    "SearchOptions",
    "SearchTool",
    "SearxngBackend",
    "build_index",
    "folders_of",
    "index_folder",
    "indexed_folders",
    "open_library",
    "open_search",
    "remove_folder",
]
