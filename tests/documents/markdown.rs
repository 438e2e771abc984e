//! What a document holds beside its words: headings, links, and what stands between backticks.

/// One document, as far as tests look at it.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// What a link to a heading of it says behind `#`.
    pub(crate) anchors: Vec<String>,
    /// Where links lead, with their lines.
    pub(crate) links: Vec<(usize, String)>,
    /// What stands between backticks, with its line.
    pub(crate) code: Vec<(usize, String)>,
    /// What fences say that they hold, with their lines.
    pub(crate) fences: Vec<(usize, String)>,
}

impl Page {
    pub(crate) fn of(text: &str) -> Self {
        let mut page = Self::default();
        let mut is_fenced = false;
        for (line, number) in text.lines().zip(1..) {
            if let Some(language) = line.trim_start().strip_prefix("```") {
                if !is_fenced {
                    page.fences.push((number, language.to_owned()));
                }
                is_fenced = !is_fenced;
            } else if !is_fenced {
                page.read(line, number);
            }
        }
        page
    }

    fn read(&mut self, line: &str, number: usize) {
        if let Some(title) = line.strip_prefix('#') {
            self.anchors.push(anchor(title.trim_start_matches('#').trim()));
        }
        // What is between backticks is no link.
        let mut words = String::new();
        for (part, is_code) in line.split('`').zip([false, true].into_iter().cycle()) {
            if is_code {
                self.code.push((number, part.to_owned()));
            } else {
                words += part;
            }
        }
        let targets = words.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        self.links.extend(targets.map(|(target, _)| (number, target.to_owned())));
    }
}

/// What GitHub makes of a title.
fn anchor(title: &str) -> String {
    let kept = title.chars().filter(|sign| sign.is_alphanumeric() || matches!(sign, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn links_headings_and_code_are_told_apart() {
    let page =
        Page::of("# A title, `with` code\nsee [a](b.md#c) and `[no](link)` and [d](#e)\n```sh\n# no title\n[no](link)\n```\n## More\n");

    assert_eq!(page.anchors, ["a-title-with-code", "more"]);
    assert_eq!(page.links, [(2, "b.md#c".to_owned()), (2, "#e".to_owned())]);
    assert_eq!(page.code, [(1, "with".to_owned()), (2, "[no](link)".to_owned())]);
    assert_eq!(page.fences, [(3, "sh".to_owned())]);
}
