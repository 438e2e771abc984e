# Makes a console page for Prometheus (its templates: prometheus.io/docs/visualization/consoles) out of a board for Grafana.
# jq -r --arg name overview --argjson boards '[{"name": "overview", "title": "…"}, …]' --arg rate_interval 30s -f console.jq overview.json
# What it does not know of a board, it refuses. Figures are put in by Prometheus at each look; board.js draws graphs, and looks again.

# As text of the page. Two braces would begin an action of the template.
def text: @html | gsub("\\{\\{"; "{&#123;");

def asked: gsub("\\$__rate_interval"; $rate_interval);

# As the template asks Prometheus; `$instance` is what the page's address says, or all.
def query($unit):
    (if $unit == "dateTimeFromNow" then "time() - (\(asked)) / 1000" else asked end | @json) as $expression
    | "reReplaceAll \"\\\\$instance\" $instance \($expression) | query";

# How a value is written.
def written($unit):
    {
        short: "{{ humanize .Value }}", s: "{{ humanizeDuration .Value }}", percentunit: "{{ humanizePercentage .Value }}",
        ops: "{{ humanize .Value }}/s", reqps: "{{ humanize .Value }}/s", bytes: "{{ humanize1024 .Value }}B", Bps: "{{ humanize1024 .Value }}B/s",
        dateTimeFromNow: "{{ humanizeDuration .Value }} ago"
    }[$unit] // error("a unit that is not known: \($unit)")
    # What is not equal to itself is no number.
    | "{{ if eq .Value .Value }}\(.){{ else }}–{{ end }}";

# A number as a float of the template's language, which compares them with no other.
def float: tostring | if test("[.e]") then . else . + ".0" end;

# What stands for some values, as `yes` for 1.
def mapped($otherwise):
    [(.mappings // [])[] | .options | to_entries[] | "{{ if eq .Value \(.key | float) }}\(.value.text | text){{ else }}"] as $cases
    | ($cases | add // "") + $otherwise + ("{{ end }}" * ($cases | length) // "");

# The colour of the highest threshold that a value reaches.
def colour:
    (.thresholds.steps // []) as $steps
    | ([$steps[1:] | reverse[] | "{{ if ge .Value \(.value | float) }}\(.color){{ else }}"] | add // "")
      + ($steps[0].color // "text") + ("{{ end }}" * ($steps[1:] | length) // "");

def labels: [scan("\\{\\{\\s*(\\w+)\\s*\\}\\}")[0]];

# The name of a series, as the template puts it together.
def named: text | gsub("\\{&#123;\\s*(?<name>\\w+)\\s*\\}\\}"; "{{ .Labels.\(.name) }}");

def unit: .fieldConfig.defaults.unit // "short";

# One figure.
def stat:
    unit as $unit | (.fieldConfig.defaults // {}) as $defaults
    | if (.targets | length) != 1 then error("one figure is one expression: \(.title)") else . end
    | "<p class=\"figure\" data-live>{{ range \(.targets[0].expr | query($unit)) }}"
      + "<span class=\"\($defaults | colour)\">\($defaults | mapped(written($unit)))</span>{{ else }}<span>–</span>{{ end }}</p>";

# A graph, and below it what its series are now.
def graph:
    unit as $unit
    | {
        unit: $unit, stacked: (.fieldConfig.defaults.custom.stacking.mode == "normal"),
        series: [.targets[] | { expression: (.expr | asked), name: (.legendFormat // "") }]
      } as $panel
    | "<div class=\"graph\" data-panel=\"\($panel | @json | text)\"></div>\n<table><tbody data-live>"
      + ([.targets[] | (.legendFormat // "") as $legend | ($legend | labels[0]) as $first
          | "{{ range \(.expr | query($unit))\(if $first then " | sortByLabel \($first | @json)" else "" end) }}"
            + "<tr><th>\($legend | named)</th><td>\(written($unit))</td></tr>{{ end }}"] | add)
      + "</tbody></table>";

# A heatmap by the buckets of a histogram, each of which holds the smaller ones, too.
def as_lines: .options.yAxis.unit as $unit | .targets |= map(.legendFormat |= "≤ \(.) \($unit)");

def panel:
    "<section style=\"grid-column: span \(.gridPos.w)\" class=\"\(.type)\">\n<h3 title=\"\(.description // "" | text)\">\(.title | text)</h3>\n"
    + (if .type == "stat" then stat
       elif .type == "timeseries" then graph
       elif .type == "heatmap" then as_lines | graph
       else error("a kind of panel that is not known: \(.type)") end)
    + "\n</section>";

def placed: if .type == "row" then "<h2>\(.title | text)</h2>" else panel end;

. as $board
| ([.templating.list[].name] - ["datasource", "instance"]) as $unknown
| if $unknown != [] then error("variables that are not known: \($unknown)") else . end
| "{{ $instance := or .Params.instance \".*\" -}}
<!doctype html>
<html lang=\"en\">
<meta charset=\"utf-8\">
<title>\($board.title | text)</title>
<link rel=\"stylesheet\" href=\"/classic/static/rickshaw/rickshaw.min.css\">
<link rel=\"stylesheet\" href=\"/user/board.css\">
<script src=\"/classic/static/d3/d3.min.js\"></script>
<script src=\"/classic/static/rickshaw/rickshaw.min.js\"></script>
<script>var PATH_PREFIX = \"\";</script>
<script src=\"/classic/static/js/prom_console.js\"></script>
<script src=\"/user/board.js\" defer></script>
<header>
<h1>\($board.title | text)</h1>
<nav>\([$boards[] | "<a href=\"\(.name).html\"\(if .name == $name then " aria-current=\"page\"" else "" end)>\(.title | text)</a>"] | join(" "))</nav>
<p data-live>{{ range query \"ALERTS{alertstate=\\\"firing\\\"}\" }}<a class=\"red\" href=\"/alerts\">{{ .Labels.alertname }}</a> {{ else }}<a href=\"/alerts\">no alert fires</a>{{ end }}</p>
\(if any($board.templating.list[]; .name == "instance") then
    "<p>Node: <a href=\"?\">all</a>{{ range query \"count by (instance) (mayfly_build_info)\" | sortByLabel \"instance\" }}
<a href=\"?instance={{ .Labels.instance }}\">{{ .Labels.instance }}</a>{{ end }}</p>"
  else "" end)
<label>The last <select id=\"duration\"><option value=\"300\">5 minutes</option><option value=\"900\">15 minutes</option><option value=\"3600\">hour</option></select></label>
</header>
<main>
\([$board.panels | sort_by(.gridPos.y, .gridPos.x)[] | placed] | join("\n"))
</main>"
