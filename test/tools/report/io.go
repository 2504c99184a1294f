package main

import (
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// Subjects of the I/O part of test/vm/bench. The last three differ from the agent's in one thing each.
const (
	ioRaw     = "raw"
	ioAgent   = "agent"
	ioQueues  = "agent, work queues on"
	ioNone    = "agent, work queues off"
	ioSectors = "agent, 512-byte sectors"
)

// ioWay is one way to read or write.
type ioWay struct {
	pattern string
	block   int // bytes
	jobs    int
	depth   int // blocks that each job has in flight
}

func (w ioWay) String() string {
	size, jobs := fmt.Sprintf("%d KiB", w.block>>10), "jobs"
	if w.block >= 1<<20 {
		size = fmt.Sprintf("%d MiB", w.block>>20)
	}
	if w.jobs == 1 {
		jobs = "job"
	}
	text := fmt.Sprintf("%s, %s, %d %s", w.pattern, size, w.jobs, jobs)
	if w.depth > 1 {
		text += fmt.Sprintf(", depth %d", w.depth)
	}
	return text
}

// ioValues are those of one subject in one way, by round.
type ioValues struct{ throughput, p99 map[int]float64 }

// ioResults are the measurements of reading and writing.
type ioResults struct {
	subjects []string          // in order of appearance
	mappings map[string]string // what device-mapper says of each
	ways     []ioWay
	values   map[ioWay]map[string]ioValues
}

func readIO(file string) (*ioResults, error) {
	rows, err := readCSV(file)
	if err != nil {
		return nil, err
	}
	r := &ioResults{mappings: map[string]string{}, values: map[ioWay]map[string]ioValues{}}
	for i, row := range rows {
		if i == 0 {
			continue // names of the columns
		}
		var numbers [7]float64 // from block_bytes on
		for c := range numbers {
			if numbers[c], err = strconv.ParseFloat(row[4+c], 64); err != nil {
				return nil, fmt.Errorf("cannot read %s: row %d: %w", file, i+1, err)
			}
		}
		subject, round := row[0], int(numbers[3])
		way := ioWay{row[3], int(numbers[0]), int(numbers[1]), int(numbers[2])}
		if r.mappings[subject] == "" {
			r.subjects = append(r.subjects, subject)
			r.mappings[subject] = "no mapping"
			if row[1] != "" {
				r.mappings[subject] = fmt.Sprintf("sectors of %s bytes, work queues %s", row[1], row[2])
			}
		}
		if r.values[way] == nil {
			r.ways = append(r.ways, way)
			r.values[way] = map[string]ioValues{}
		}
		if r.values[way][subject].p99 == nil {
			r.values[way][subject] = ioValues{map[int]float64{}, map[int]float64{}}
		}
		r.values[way][subject].throughput[round], r.values[way][subject].p99[round] = numbers[4], numbers[6]
	}
	if !slices.Contains(r.subjects, ioRaw) {
		return nil, fmt.Errorf("cannot read %s: it has no results of the raw disk", file)
	}
	return r, nil
}

// over is the ratio of two subjects in each round: what disturbs a round disturbs both.
func over(a, b map[int]float64) (spread, bool) {
	var ratios []float64
	for round, v := range a {
		if b[round] > 0 {
			ratios = append(ratios, v/b[round])
		}
	}
	return spreadOf(ratios)
}

func (s spread) String() string {
	return fmt.Sprintf("%s (%s – %s)", ratio(s.median), ratio(s.low), ratio(s.high))
}

// ratio has two digits or more.
func ratio(v float64) string {
	if v < 0.1 {
		return strconv.FormatFloat(v, 'f', 3, 64)
	}
	return digits(v)
}

// subjectsTable says what each subject is.
func (r *ioResults) subjectsTable() string {
	var b strings.Builder
	b.WriteString("| subject | its mapping |\n| --- | --- |\n")
	for _, s := range r.subjects {
		fmt.Fprintf(&b, "| %s | %s |\n", s, r.mappings[s])
	}
	return b.String()
}

// table has each subject's throughput over that of the raw disk.
func (r *ioResults) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| throughput / raw: median (least – most) | raw, MiB/s | %s |\n", strings.Join(r.mapped(), " | "))
	b.WriteString("| --- | --- |" + strings.Repeat(" --- |", len(r.mapped())) + "\n")
	for _, w := range r.ways {
		raw := r.values[w][ioRaw].throughput
		var all []float64
		for _, v := range raw {
			all = append(all, v/(1<<20))
		}
		s, _ := spreadOf(all)
		fmt.Fprintf(&b, "| %s | %s |", w, digits(s.median))
		for _, s := range r.mapped() {
			if v, ok := over(r.values[w][s].throughput, raw); ok {
				fmt.Fprintf(&b, " %s |", v)
			} else {
				b.WriteString(" |")
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// settings has what the agent's settings are worth.
func (r *ioResults) settings() string {
	pairs := []struct{ what, a, b string }{
		{"agent / with both queues", ioAgent, ioQueues}, {"without queues / agent", ioNone, ioAgent}, {"agent / with sectors of 512 bytes", ioAgent, ioSectors},
	}
	var b strings.Builder
	b.WriteString("| median (least – most) |")
	for _, p := range pairs {
		fmt.Fprintf(&b, " %s: throughput | p99 latency |", p.what)
	}
	b.WriteString("\n| --- |" + strings.Repeat(" --- | --- |", len(pairs)) + "\n")
	for _, w := range r.ways {
		fmt.Fprintf(&b, "| %s |", w)
		for _, p := range pairs {
			x, y := r.values[w][p.a], r.values[w][p.b]
			for _, pair := range [][2]map[int]float64{{x.throughput, y.throughput}, {x.p99, y.p99}} {
				if v, ok := over(pair[0], pair[1]); ok {
					fmt.Fprintf(&b, " %s |", v)
				} else {
					b.WriteString(" |")
				}
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// mapped are all subjects but the raw disk.
func (r *ioResults) mapped() []string {
	return slices.DeleteFunc(slices.Clone(r.subjects), func(s string) bool { return s == ioRaw })
}

// ioSpreads are points with the least and the most of each.
type ioSpreads struct {
	plotter.XYs
	plotter.XErrors
}

// plot has a line of points for each way, from the top down.
func (r *ioResults) plot(file string) error {
	p := plot.New()
	p.Title.Text = "Reading and writing: throughput as a ratio to the raw disk, emulated\nmedian of the rounds; bars from the least to the most"
	p.X.Label.Text = "throughput / that of the raw disk (1 is the raw disk)"
	p.Title.TextStyle.Font.Size, p.X.Label.TextStyle.Font.Size = 14, 12
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.TickerFunc(steps)
	p.Add(plotter.NewGrid())
	var names []plot.Tick
	for i, w := range r.ways {
		names = append(names, plot.Tick{Value: float64(-i), Label: w.String()})
	}
	p.Y.Tick.Marker = plot.ConstantTicks(names)
	p.Legend.Top, p.Legend.Left, p.Legend.TextStyle.Font.Size, p.Legend.Padding = true, true, 10, vg.Points(2)
	shapes := []draw.GlyphDrawer{draw.CircleGlyph{}, draw.BoxGlyph{}, draw.TriangleGlyph{}, draw.PyramidGlyph{}, draw.SquareGlyph{}}
	shades := []color.RGBA{looks[parallel].colour, looks[agent].colour, {0, 0, 0, 255}, looks[systemd].colour, looks[clevis].colour} // cryptsetup's and the agent's as everywhere
	least, most := math.Inf(1), 1.0
	for i, s := range r.mapped() {
		var data ioSpreads
		for line, w := range r.ways {
			v, ok := over(r.values[w][s].throughput, r.values[w][ioRaw].throughput)
			if !ok {
				continue
			}
			// Beside each other, not on each other.
			y := -float64(line) + 0.3 - 0.15*float64(i)
			data.XYs = append(data.XYs, plotter.XY{X: v.median, Y: y})
			data.XErrors = append(data.XErrors, struct{ Low, High float64 }{v.median - v.low, v.high - v.median})
			least, most = min(least, v.low), max(most, v.high)
		}
		points, err := plotter.NewScatter(data.XYs)
		if err != nil {
			return err
		}
		bars, err := plotter.NewXErrorBars(data)
		if err != nil {
			return err
		}
		points.Color, bars.Color = shades[i%len(shades)], shades[i%len(shades)]
		points.Shape, points.Radius = shapes[i%len(shapes)], vg.Points(3.5)
		p.Add(points, bars)
		p.Legend.Add(s+": "+r.mappings[s], points)
	}
	raw, err := plotter.NewLine(plotter.XYs{{X: 1, Y: 1}, {X: 1, Y: -float64(len(r.ways))}})
	if err != nil {
		return err
	}
	raw.Width = vg.Points(1.5)
	p.Add(raw)
	p.Legend.Add("raw disk", raw)
	p.X.Min, p.X.Max = least/1.2, most*1.2
	p.Y.Min, p.Y.Max = 0.5-float64(len(r.ways)), 3.5 // room for the legend
	return p.Save(11*vg.Inch, 9*vg.Inch, file)
}
