"""Names, captions and addresses that mean harm."""

from __future__ import annotations

NAMES = [
    "../../etc/passwd", "..\\..\\windows\\win.ini", "/etc/passwd", "C:\\boot.ini", "a/../../b.png", "....//x.png",
    ".htaccess", ".ssh", "-rf", "--n", "con", "CON.png", "aux.txt", "lpt1.png", "nul", "a\0b.png", "a\nb.png",
    "a\r\nSet-Cookie: x.png", "\u202egnp.exe", "$(touch x).png", "`id`.png", ";reboot;.png", "a|b.png", "a&b.png",
    "<script>alert(1)</script>.png", "\"><img src=x onerror=alert(1)>.png", "' OR 1=1 --.png", "x" * 300 + ".png",
    "   .png", "%2e%2e%2fx.png", "...", "~root", "{{7*7}}.png", "\ud7ff\uffff.png",
]  # fmt: skip

CAPTIONS = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked = 1'>", "</textarea><script>hacked=1</script>",
    "\"><svg onload=window.hacked=1>", "' onfocus='window.hacked=1' autofocus='", "javascript:window.hacked=1",
    "--n 5", "; rm -rf /", "$(touch hacked)", "`touch hacked`", "| touch hacked", "&& touch hacked", "a\nb\nc",
    "a\r\nb", "a\0b", "\u202eright to left", "\u200b\u200b", "😀" * 50, "x" * 300, "{{7*7}}", "${7*7}", "%s%n%x",
    "../../../etc/passwd", "file:///etc/passwd", "[[data]]\nfolder = '/'", '"""', "'''", "\\", "&lt;b&gt;", "\ufeffbom",
]  # fmt: skip

ADDRESSES = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/gradio_api/file/etc/passwd",
    "/gradio_api/file=http://example.com/x", "/file=/etc/passwd", "/gradio_api/proxy=http://example.com/",
    "/studio/picture/../../../etc/passwd", "/studio/picture/..%2f..%2f..%2fetc%2fpasswd",
    "/studio/picture/%2e%2e/%2e%2e/jobs/a.json", "/studio/picture/%252e%252e%252fjobs%252fa.json",
    "/studio/picture/..\\..\\jobs", "/studio/picture/.hidden.png", "/studio/picture/" + "0" * 40 + ".html",
    "/studio/picture/" + "0" * 40 + ".svg", "/studio/picture/link.png", "/studio/picture/" + "a" * 40 + ".png",
    "/studio/run/..%2f..%2fetc/config.toml", "/studio/run/.studio/config.toml", "/studio/run/../epoch/1",
    "/studio/run/a/epoch/-1", "/studio/run/a/epoch/..", "/studio/run/a/report.html", "/studio/run/a/log.txt",
    "/.studio/draft.json", "//etc/passwd", "/static/../../../../etc/passwd", "/assets/..%2f..%2f..%2fetc/passwd",
    "/gradio_api/runs", "/docs", "/openapi.json", "/gradio_api/openapi.json", "/monitoring", "/gradio_api/vibe-code/",
    "/studio/picture/%00.png", "/svelte/../../etc/passwd", "/custom_component/x/client/component/x.js",
]  # fmt: skip
