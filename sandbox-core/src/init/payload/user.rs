//! Whom the payload runs as: numbers, or names of the image's own `/etc/passwd` and `/etc/group` — never the host's.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
};

use rustix::fs::{CWD, Mode, OFlags};

use super::open_safely;
use crate::{
    error::{LaunchError, Step},
    ids,
    init::never,
    protocol::init::User,
};

/// A user with all that the kernel and the environment need to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::init) struct Identity {
    pub(in crate::init) uid: u32,
    pub(in crate::init) gid: u32,
    pub(in crate::init) groups: Vec<u32>,
    pub(in crate::init) home: String,
    /// As a bit mask; none unless the keeper says so.
    pub(in crate::init) capabilities: u64,
}

/// The most bytes of a passwd or group file that are read.
const FILE_BYTES_MAX: u64 = 1 << 20;

impl Identity {
    pub(in crate::init) fn find(user: &User) -> Result<Self, LaunchError> {
        let passwd = read("/etc/passwd").step_on("reading", "/etc/passwd")?;
        let group = read("/etc/group").step_on("reading", "/etc/group")?;
        let found = Self::find_in(user, &passwd, &group)?;
        let ids = [found.uid, found.gid].into_iter().chain(found.groups.iter().copied());
        match ids.max() {
            Some(id) if id >= ids::OF_GUEST => Err(never("finding the user", id, format!("ids in a sandbox are below {}", ids::OF_GUEST))),
            _ => Ok(found),
        }
    }

    fn find_in(user: &User, passwd: &[String], group: &[String]) -> Result<Self, LaunchError> {
        match user {
            User::Ids { uid, gid, groups } => {
                let home = passwd.iter().filter_map(|line| Entry::parse(line)).find(|entry| entry.uid == *uid).map(|entry| entry.home);
                Ok(Self { uid: *uid, gid: *gid, groups: groups.clone(), home: home.unwrap_or("/").to_owned(), capabilities: 0 })
            }
            User::Named(text) => {
                let (name, group_name) = text.split_once(':').map_or((text.as_str(), None), |(name, group)| (name, Some(group)));
                let mut entries = passwd.iter().filter_map(|line| Entry::parse(line));
                let (uid, entry) = match number(name) {
                    Some(uid) => (uid, entries.find(|entry| entry.uid == uid)),
                    None => {
                        let entry = entries.find(|entry| entry.name == name);
                        let entry = entry.ok_or_else(|| never("finding the user", name, "no such user in the image's /etc/passwd"))?;
                        (entry.uid, Some(entry))
                    }
                };
                let gid = match group_name {
                    None => entry.as_ref().map_or(0, |entry| entry.gid),
                    Some(wanted) => match number(wanted) {
                        Some(gid) => gid,
                        None => group_id(group, wanted)
                            .ok_or_else(|| never("finding the group", wanted, "no such group in the image's /etc/group"))?,
                    },
                };
                let groups = entry.as_ref().filter(|_| group_name.is_none()).map_or_else(Vec::new, |entry| groups_of(group, entry.name));
                let home = entry.map_or("/", |entry| entry.home).to_owned();
                Ok(Self { uid, gid, groups, home, capabilities: 0 })
            }
        }
    }
}

/// Digits and nothing else are an id; everything else is a name. What is half of one is never taken for the other (CVE-2026-30892).
fn number(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u32::MAX))
}

/// A line of passwd(5).
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, _password, uid, gid, _comment, home) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        Some(Self { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home: if home.is_empty() { "/" } else { home } })
    }
}

/// Name, id and members of a line of group(5).
fn group_line(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _password, gid, members) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    Some((name, gid.parse().ok()?, members))
}

fn group_id(group: &[String], wanted: &str) -> Option<u32> {
    group.iter().filter_map(|line| group_line(line)).find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid)
}

fn groups_of(group: &[String], user: &str) -> Vec<u32> {
    let lines = group.iter().filter_map(|line| group_line(line));
    lines.filter(|(_, _, members)| members.split(',').any(|member| member == user)).map(|(_, gid, _)| gid).collect()
}

/// The lines of a file of the image; none if there is no such file.
fn read(path: &str) -> io::Result<Vec<String>> {
    // A FIFO or device in the image's place of this file must not hold init up.
    match open_safely(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()) {
        Ok(file) => {
            let file = File::from(file);
            if !file.metadata()?.is_file() {
                return Ok(Vec::new());
            }
            let lines = BufReader::new(file.take(FILE_BYTES_MAX)).split(b'\n');
            lines.map(|line| line.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())).collect()
        }
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    fn find(user: &User) -> Result<Identity, LaunchError> {
        let passwd = lines("root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nbroken\n");
        let group = lines("root:x:0:\nann:x:1000:\naudio:x:29:bob,ann\nvideo:x:44:bob\n");
        Identity::find_in(user, &passwd, &group)
    }

    #[test]
    fn a_name_brings_its_groups_and_home() {
        let found = find(&User::Named("ann".into())).unwrap();
        assert_eq!(found, Identity { uid: 1000, gid: 1000, groups: vec![29], home: "/home/ann".into(), capabilities: 0 });
    }

    #[test]
    fn a_name_with_a_group_has_that_group_alone() {
        let found = find(&User::Named("ann:video".into())).unwrap();
        assert_eq!((found.gid, found.groups), (44, vec![]));
    }

    #[test]
    fn a_name_that_the_image_lacks_is_an_error_that_names_it() {
        let error = find(&User::Named("mallory".into())).unwrap_err().to_string();
        assert!(error.contains("mallory"), "{error}");
    }

    #[test]
    fn a_number_alone_brings_what_the_image_says_of_it_and_needs_no_entry() {
        let found = find(&User::Named("1000".into())).unwrap();
        assert_eq!(found, Identity { uid: 1000, gid: 1000, groups: vec![29], home: "/home/ann".into(), capabilities: 0 });
        let found = find(&User::Named("4242".into())).unwrap();
        assert_eq!(found, Identity { uid: 4242, gid: 0, groups: vec![], home: "/".into(), capabilities: 0 });
        assert_eq!(find(&User::Named("4242:video".into())).unwrap().gid, 44);
    }

    #[test]
    fn what_is_nearly_a_number_is_a_name() {
        for text in ["1000x", "+1000", " 1000", "0x0", "-1", "1000 "] {
            let error = find(&User::Named(text.into())).unwrap_err().to_string();
            assert!(error.contains("no such user"), "{text}: {error}");
        }
        // Beyond what an id can be, it is refused by `find` as too large, and wraps to nobody.
        assert_eq!(find(&User::Named("4294967296".into())).unwrap().uid, u32::MAX);
    }

    #[test]
    fn numbers_need_no_entry() {
        let found = find(&User::Ids { uid: 4242, gid: 7, groups: vec![] }).unwrap();
        assert_eq!(found, Identity { uid: 4242, gid: 7, groups: vec![], home: "/".into(), capabilities: 0 });
    }
}
