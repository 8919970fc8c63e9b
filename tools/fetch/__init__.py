"""Opening a page of the web: its readable text, and no way into the machine or its network."""

from tools.fetch.guard import Guard, Refused
from tools.fetch.page import Page, PageError, open_page
from tools.fetch.tool import FetchTool

__all__ = ["FetchTool", "Guard", "Page", "PageError", "Refused", "open_page"]
