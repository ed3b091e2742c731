"""A viewer in a web page, to scroll through a scan after its pipeline; the page needs no network."""

from umbrella_data.viewer.fragment import Overlay, viewer_html, viewer_script

__all__ = ["Overlay", "viewer_html", "viewer_script"]
