"""The text of a web page, on the standard library's tolerant parser."""

import re
from html.parser import HTMLParser


class HTMLText(HTMLParser):
    """Collects the text of a page: headings as in Markdown, blocks as paragraphs, scripts and styles dropped.

    Attributes:
        title, first_heading: as they stand in the page, white space included.
    """

    dropped = frozenset("script style template svg noscript iframe object math head".split())
    blocks = frozenset(
        "address article aside blockquote body dd details div dl dt fieldset figcaption figure footer form "
        "h1 h2 h3 h4 h5 h6 header hr html li main nav ol p pre section summary table tbody td tfoot th thead "
        "tr ul".split()
    )
    tight = frozenset("li tr dt dd td th thead tbody tfoot".split())

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title, self.first_heading = "", ""
        self.skipped: list[str] = []
        self.in_title, self.heading, self.preformatted = False, "", 0

    def close(self):
        if self.rawdata.startswith("<!--") and not self.cdata_elem:  # left open: it lasts to the page's end
            self.rawdata = ""
        super().close()

    def handle_starttag(self, tag, attrs):
        if tag == "title" and "svg" not in self.skipped:
            self.in_title = not self.title
        elif tag == "body":
            self.skipped.clear()
        elif tag in self.dropped:
            self.skipped.append(tag)
        elif tag == "br":
            self.parts.append("\n")
        elif tag in self.blocks:
            self._break(tag)
            if tag == "pre":
                self.preformatted += 1
            elif tag == "li":
                self.parts.append("- ")
            elif re.fullmatch("h[1-6]", tag):
                self.heading = tag
                self.parts.append("#" * int(tag[1]) + " ")

    def handle_startendtag(self, tag, attrs):
        if tag == "br" or tag == "hr":
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag == "title":
            self.in_title = False
        elif tag in self.skipped:
            del self.skipped[self.skipped.index(tag) :]
        elif tag in self.blocks:
            self.preformatted -= tag == "pre" and self.preformatted > 0
            self.heading = "" if tag == self.heading else self.heading
            self._break(tag)

    def handle_data(self, data):
        if self.in_title:
            self.title += data
        elif not self.skipped:
            if self.heading and not self.first_heading.strip():
                self.first_heading += data
            self.parts.append(data if self.preformatted else self._collapse(data))

    def _collapse(self, data: str) -> str:
        text = re.sub(r"\s+", " ", data)
        after_space = not self.parts or self.parts[-1].endswith((" ", "\n", "\t"))
        return text.lstrip(" ") if after_space else text

    def _break(self, tag: str) -> None:
        if not self.skipped:
            self.parts.append({"td": "\t", "th": "\t"}.get(tag, "\n" if tag in self.tight else "\n\n"))

    def text(self) -> str:
        lines = (line.rstrip() for line in "".join(self.parts).split("\n"))
        text = "\n".join("" if re.fullmatch("#{1,6}|-", line) else line for line in lines)
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
