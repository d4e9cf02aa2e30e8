"""The browser's fixture sees what it is there to see."""

import pytest


def test_a_page_is_shown_and_its_script_runs(open_page):
    page = open_page("<!doctype html><p id=a>before</p><script>a.textContent = 'after'</script>")
    assert page.text_content("#a") == "after"


@pytest.mark.parametrize(
    "fault", ["<script>throw Error('no')</script>", "<script>console.error('no')</script>", "<img src=http://a.test/b>"]
)
def test_a_fault_of_a_page_is_seen(open_page, complaints, fault):
    open_page(f"<!doctype html>{fault}")
    assert complaints
    complaints.clear()
