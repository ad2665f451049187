"""A page as a browser reads it."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """What a page refers to, its elements, and the data in it."""

    def __init__(self, page):
        super().__init__()
        self.refers, self.names, self.texts, self.tag, self.open = [], [], {}, "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names.append(tag)
        self.tag = given.get("id") or tag
        self.refers += [
            v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data):
        self.texts[self.tag] = self.texts.get(self.tag, "") + data
