"""Reports as one self-contained page: `sections` says what is shown, `html` how it is written.

`parts` is what pages are made of, so that other pages (of a sweep, of an analysis) can be made of it too:
`to_html(Document("title", sections))`. Plots are drawn by Chart.js (MIT), a copy of which lies in `assets` and goes
into each page: a page needs no network, and nothing but a browser.
"""
