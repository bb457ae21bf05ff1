"""The HTML of the web pages. Everything put into it is escaped, except a card that ``pages`` has rendered."""

from __future__ import annotations

import jinja2

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --add: #2a02; --del: #c002; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 0 1rem 3rem;
       overflow-wrap: anywhere; }
header { border-bottom: 1px solid var(--line); padding: .8rem 0; margin-bottom: 1rem; }
h1 { font-size: 1.4rem; margin: .2rem 0; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
ul.plain { list-style: none; padding: 0; } ul.plain > li { border-top: 1px solid var(--line); padding: .5rem 0; }
small, .quiet { opacity: .75; } code, pre { font: 13px/1.45 ui-monospace, monospace; background: var(--soft); }
pre { overflow-x: auto; padding: .6rem; } code { padding: 0 .2rem; } pre code { padding: 0; }
pre .add { background: var(--add); display: block; } pre .del { background: var(--del); display: block; }
.tag { border: 1px solid var(--line); border-radius: 1rem; padding: 0 .5rem; font-size: .8rem; white-space: nowrap; }
.warn { border-left: 4px solid #c60; padding-left: .6rem; } img { max-width: 100%; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid var(--line); padding: .2rem .5rem; }
input { font: inherit; padding: .3rem; width: min(24rem, 65%); } button { font: inherit; padding: .3rem .8rem; }
"""

_BASE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{% block title %}{{ title }}{% endblock %}</title><link rel="stylesheet" href="/style.css"></head><body>
<header><a href="/">Hub</a>{% if repo %} / <a href="/{{ repo.web_path }}">{{ repo }}</a>{% endif %}</header>
{% block body %}{% endblock %}
</body></html>
"""

_LIST = """{% extends "base" %}{% block body %}
<form action="/"><input name="search" value="{{ search }}" aria-label="Search" autofocus> <button>Search</button></form>
<ul class="plain">{% for item in found %}
<li><a href="/{{ item.id.web_path }}">{{ item.id }}</a> <span class="tag">{{ item.id.kind }}</span>
{% if item.private %}<span class="tag">private</span>{% endif %}<br><small>{{ item.changed }}</small></li>
{% else %}<li>Nothing found.</li>{% endfor %}</ul>{% endblock %}
"""

_REPO = """{% extends "base" %}{% block body %}<h1>{{ repo }}</h1>
<p><span class="tag">{{ repo.kind }}</span> <a href="/{{ repo.web_path }}/tree/main">files</a> ·
<a href="/{{ repo.web_path }}/commits/main">commits</a></p>
{% if versions %}<h2>Versions</h2><ul class="plain">{% for version in versions %}
<li><a href="/{{ repo.web_path }}/tree/{{ version.name }}"><b>{{ version.name }}</b></a>
<code>{{ version.commit[:12] }}</code> <small>{{ version.changed }}</small>
{% for variant in version.variants %}<span class="tag">{{ variant }}</span> {% endfor %}
{% if version.yanked %}<div class="warn">Yanked: {{ version.yanked }}</div>{% endif %}
<div><a href="/{{ repo.web_path }}/commits/{{ version.name }}">commits</a>
{% if version.before %}· <a href="/{{ repo.web_path }}/compare/{{ version.before }}...{{ version.name }}">changes
since {{ version.before }}</a>{% endif %}</div></li>{% endfor %}</ul>{% endif %}
{% if pulls %}<h2>Pull requests</h2><ul class="plain">{% for pull in pulls %}
<li><a href="/{{ repo.web_path }}/discussions/{{ pull.number }}">#{{ pull.number }} {{ pull.title }}</a>
<span class="tag">{{ pull.status }}</span></li>{% endfor %}</ul>{% endif %}
{% if card %}<h2>Card</h2><article>{{ card }}</article>{% endif %}{% endblock %}
"""

_TREE = """{% extends "base" %}{% block body %}<h1>{{ path or repo.name }} <small>at {{ revision }}</small></h1>
<ul class="plain">{% for item in entries %}<li><a href="{{ item.href }}">{{ item.name }}</a>
{% if item.size is not none %}<small>{{ "{:,}".format(item.size) }} bytes</small>{% endif %}</li>{% endfor %}</ul>
{% endblock %}
"""

_COMMITS = """{% extends "base" %}{% block body %}<h1>Commits of {{ revision }}</h1>
<ul class="plain">{% for item in commits %}<li><a href="/{{ repo.web_path }}/commit/{{ item.oid }}">{{ item.title }}</a>
<br><small>{{ item.author }}, {{ item.changed }}, <code>{{ item.oid[:12] }}</code></small></li>{% endfor %}</ul>
{% if next %}<a href="{{ next }}">older</a>{% endif %}{% endblock %}
"""

_DIFF = """{% extends "base" %}{% block body %}<h1>{{ heading }}</h1>
{% if text %}<pre>{{ text }}</pre>{% endif %}<p class="quiet">{{ changes|length }} files differ{{ cut }}</p>
{% for change in changes %}<h2>{{ change.path }} <span class="tag">{{ change.kind }}</span></h2>
{% if change.lines is none %}<p class="quiet">not shown: not text, or too long</p>{% else %}
<pre>{% for line in change.lines
%}<span class="{{ line.kind }}">{{ line.text }}
</span>{% endfor %}</pre>{% endif %}{% endfor %}{% endblock %}
"""

pages = jinja2.Environment(
    loader=jinja2.DictLoader(
        {
            "base": _BASE,
            "list": _LIST,
            "repo": _REPO,
            "tree": _TREE,
            "commits": _COMMITS,
            "diff": _DIFF,
        }
    ),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)
