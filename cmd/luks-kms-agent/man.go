package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/luks-kms-agent/luks-kms-agent/agent"
)

func newMan() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIRECTORY",
		Short: "Write the man pages",
		Long: `Write a man page for every command into a directory. They say what --help says.
The date in them is SOURCE_DATE_EPOCH where that is set.`,
		Example: `  luks-kms-agent man /tmp/man8
  man -l /tmp/man8/luks-kms-agent.8`,
		Args:   args(cobra.ExactArgs(1)),
		Hidden: true,
		RunE: func(cmd *cobra.Command, dirs []string) error {
			date := time.Now().UTC()
			if seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
				date = time.Unix(seconds, 0).UTC()
			}
			if err := os.MkdirAll(dirs[0], 0o755); err != nil {
				return err
			}
			return writePages(cmd.Root(), dirs[0], date)
		},
	}
}

func writePages(cmd *cobra.Command, dir string, date time.Time) error {
	if err := os.WriteFile(filepath.Join(dir, pageName(cmd)+".8"), []byte(manPage(cmd, date)), 0o644); err != nil {
		return err
	}
	for _, sub := range documented(cmd) {
		if err := writePages(sub, dir, date); err != nil {
			return err
		}
	}
	return nil
}

// documented are the subcommands that have a man page.
func documented(cmd *cobra.Command) []*cobra.Command {
	var subs []*cobra.Command
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" {
			subs = append(subs, sub)
		}
	}
	return subs
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manPage is the man page of a command, in man(7)'s macros.
func manPage(cmd *cobra.Command, date time.Time) string {
	cmd.InitDefaultHelpFlag()
	cmd.InitDefaultVersionFlag()
	p := &roff{}
	fmt.Fprintf(p, ".TH %s 8 %s \"luks-kms-agent %s\" \"System administration\"\n.nh\n.ad l\n",
		roffEscape(strings.ToUpper(pageName(cmd))), date.Format(time.DateOnly), roffEscape(version))
	p.section("NAME")
	p.line(pageName(cmd) + " - " + strings.ToLower(cmd.Short[:1]) + cmd.Short[1:])
	p.section("SYNOPSIS")
	command := cmd.CommandPath()
	fmt.Fprintf(p, "\\fB%s\\fR%s\n", roffEscape(command), roffEscape(strings.TrimPrefix(useLine(cmd), command)))
	p.section("DESCRIPTION")
	p.text(cmd.Long)
	if subs := documented(cmd); len(subs) > 0 {
		p.section("COMMANDS")
		for _, sub := range subs {
			p.entry(sub.Name(), sub.Short+". See "+pageName(sub)+"(8).")
		}
	}
	p.flags("OPTIONS", cmd.NonInheritedFlags())
	p.flags("GLOBAL OPTIONS", cmd.InheritedFlags())
	p.section("EXAMPLES")
	p.verbatim(cmd.Example)
	p.section("EXIT STATUS")
	for _, e := range exitCodes {
		p.entry(strconv.Itoa(e.code), e.meaning)
	}
	p.section("FILES")
	p.entry(agent.DefaultConfigPath, "the configuration")
	p.entry(agent.DefaultStateDir, "the records of data keys and volumes; keep a copy of them")
	p.entry(agent.DefaultStatusPath, "how the last run of this boot went")
	p.section("SEE ALSO")
	pages := seeAlso(cmd)
	for i, page := range pages {
		comma := ","
		if i == len(pages)-1 {
			comma = ""
		}
		fmt.Fprintf(p, ".BR %s%s\n", roffEscape(page), comma)
	}
	return p.String()
}

// seeAlso are, as .BR wants them, the pages beside that of a command: its parent, its siblings, and cryptsetup's.
func seeAlso(cmd *cobra.Command) []string {
	var pages []string
	if cmd.HasParent() {
		pages = append(pages, pageName(cmd.Parent())+" (8)")
		for _, sub := range documented(cmd.Parent()) {
			if sub != cmd {
				pages = append(pages, pageName(sub)+" (8)")
			}
		}
	}
	for _, sub := range documented(cmd) {
		pages = append(pages, pageName(sub)+" (8)")
	}
	return append(pages, "cryptsetup (8)")
}

// roff is a page being written.
type roff struct{ strings.Builder }

func (p *roff) section(title string) { fmt.Fprintf(p, ".SH %s\n", title) }

// line writes text that is filled. The source is kept narrow, with room for what is escaped.
func (p *roff) line(text string) {
	for _, line := range strings.Split(fill(text, 64), "\n") {
		p.WriteString(roffLine(line) + "\n")
	}
}

// entry writes a term and, indented below, what it means.
func (p *roff) entry(term, meaning string) {
	fmt.Fprintf(p, ".TP\n\\fB%s\\fR\n", roffEscape(term))
	p.line(meaning)
}

// text writes paragraphs; one whose lines are indented stays as it is.
func (p *roff) text(text string) {
	for i, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			p.WriteString(".PP\n")
		}
		if verbatim(paragraph) {
			p.verbatim(paragraph)
		} else {
			p.line(paragraph)
		}
	}
}

func (p *roff) verbatim(text string) {
	p.WriteString(".RS 4\n.nf\n")
	for _, line := range strings.Split(text, "\n") {
		p.WriteString(roffLine(strings.TrimPrefix(line, "  ")) + "\n")
	}
	p.WriteString(".fi\n.RE\n")
}

func (p *roff) flags(title string, flags *pflag.FlagSet) {
	if !flags.HasAvailableFlags() {
		return
	}
	p.section(title)
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		term := "--" + f.Name
		if f.Shorthand != "" {
			term = "-" + f.Shorthand + ", " + term
		}
		if value != "" {
			term += " " + value
		}
		if f.DefValue != "" && f.DefValue != "false" {
			usage += " (default: " + f.DefValue + ")"
		}
		p.entry(term, usage)
	})
}

// roffEscape makes text plain to roff: its backslashes and hyphens are those of the keyboard.
func roffEscape(text string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", "\\(ga", "^", `\(ha`, "~", `\(ti`).Replace(text)
}

var quoted = regexp.MustCompile("`([^`]+)`")

// roffLine is one line of text: no request to roff, what is in backquotes bold.
func roffLine(line string) string {
	var b strings.Builder
	for {
		at := quoted.FindStringSubmatchIndex(line)
		if at == nil {
			break
		}
		b.WriteString(roffEscape(line[:at[0]]) + `\fB` + roffEscape(line[at[2]:at[3]]) + `\fR`)
		line = line[at[1]:]
	}
	b.WriteString(roffEscape(line))
	if text := b.String(); strings.HasPrefix(text, ".") {
		return `\&` + text
	}
	return b.String()
}
