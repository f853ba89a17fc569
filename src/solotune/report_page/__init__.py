"""`report.html`: one page that says what happened in a run, why, and what came of it; made from the run's files alone.

    build.build_page(run_dir) -> str            the whole page, one file without references to others
    build.build_comparison(first, second)       two runs on one page
    curves.curves(run_dir, since) -> dict       the curves, from a byte of metrics.jsonl on, for a page that is open

`pages` has what a page consists of (dataclasses without HTML); the `*_section` modules fill it from a `RunRecord`;
`render` turns it into HTML with the templates in `templates/`. uPlot draws the charts: `vendor/uplot` has its files as
they are on npm, with version, licence and sha256.

The package does not bear the name of its verb, because importing `solotune.report` as a module would replace the
function `solotune.report`.
"""
